"""Very many photos: listed in one order, classified or embedded, written in partitions, resumed after a kill."""
