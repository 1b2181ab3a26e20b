"""The screens. Each says in its module what it shows; what all have in common is in `base`."""
