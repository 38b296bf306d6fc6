"""Recall and false drops of each rule's defaults, on labelled sets that the defaults were not chosen on."""
