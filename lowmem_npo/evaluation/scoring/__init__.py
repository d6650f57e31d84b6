"""What a model gives for rows: likelihoods, token scores, greedy and sampled answers, batch by batch."""
