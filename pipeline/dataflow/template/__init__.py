"""The flex templates: their options, specs and limits, and the launcher that runs inside a template."""
