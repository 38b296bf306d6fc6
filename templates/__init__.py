"""What is deployed: the launcher's entry point, the templates' metadata, the workflow."""
