"""How channels pass through operators: tables of rules, one rule an operator."""
