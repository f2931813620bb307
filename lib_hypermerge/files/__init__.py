"""Reading and writing model files: headers first, tensor by tensor, never a whole file."""
