"""Arm Ethos-U: integer graphs lowered to TOSA, checked on its reference model, compiled by Vela."""
