"""Tools: plain typed Python functions that a model may call, under a policy that a person sets."""
