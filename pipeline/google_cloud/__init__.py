"""Clients of Google Cloud's REST APIs."""
