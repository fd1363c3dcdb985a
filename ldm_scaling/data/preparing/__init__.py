"""From collections to shards: examined, filtered, freed of duplicates, split, written."""
