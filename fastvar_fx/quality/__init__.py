"""Quality: what pruning changes in images and likelihoods."""
