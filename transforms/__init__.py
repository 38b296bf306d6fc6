"""The rules of the recipe: pure functions, each beside the PTransform that wires it."""
