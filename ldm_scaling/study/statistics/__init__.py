"""Statistics of the study: intervals, comparisons, races, scaling fits. Numbers in, numbers out."""
