"""Low-rank companions beside sparse weights: added, trained, merged with the zeros kept."""
