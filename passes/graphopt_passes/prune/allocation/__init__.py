"""How many units each group loses."""
