"""The commands of `dwiml-func`: one module each, for parsing and printing."""
