"""Embeds whole data sets, on all hosts together, into stores on disk."""
