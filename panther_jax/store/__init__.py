"""The preprocessed store, ours and nnU-Net's."""
