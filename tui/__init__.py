"""The terminal user interface: it reads the record and acts by the verbs of the command line. It never loads the engine."""
