"""From images to label maps: tiles, sliding window, members, export to the raw grid."""
