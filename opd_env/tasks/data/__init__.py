"""Where problems come from: rows of files and the hub, tables in YAML, draws from a seed; splits and their checks."""
