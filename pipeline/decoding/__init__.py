"""Decoding untrusted image bytes, within bounds and in a watched child process."""
