"""The rules of the recipe: pure functions, each next to the PTransform that wires it."""
