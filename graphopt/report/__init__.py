"""What a person sees of a run: the values, a terminal table, JSON and HTML."""
