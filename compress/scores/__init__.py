"""How much each head or channel matters to a model: one file each, whose name is its name in a recipe."""
