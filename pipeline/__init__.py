"""pairsift: the graphs, the command line, and what reads and writes files."""
