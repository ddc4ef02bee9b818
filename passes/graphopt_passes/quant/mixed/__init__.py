"""Mixed precision: what every form of a layer costs, and a form for each within a budget."""
