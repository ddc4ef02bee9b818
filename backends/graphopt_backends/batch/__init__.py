"""Batches of any size from a model that is compiled for one: the proof that samples stay apart."""
