"""Moving a change of weights from one model to a related one: subspaces, their likeness, and what is projected."""
