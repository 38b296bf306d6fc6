"""Decodes untrusted image bytes within bounds, in watched threads or in child processes."""
