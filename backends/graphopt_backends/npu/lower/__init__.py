"""How operators on integers become TOSA, one module for each family."""
