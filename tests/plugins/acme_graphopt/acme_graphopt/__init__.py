"""What Acme adds to graphopt: a pass, a pruning criterion, a camera to compile for and a reader for its recordings."""
