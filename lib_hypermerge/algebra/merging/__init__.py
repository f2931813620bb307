"""How several changes of one layer become one: without data, from the changes alone."""
