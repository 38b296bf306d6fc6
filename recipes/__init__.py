"""The bundled recipes."""
