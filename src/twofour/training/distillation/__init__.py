"""What a model learns from its dense self: which tensors of both are compared, and by which loss."""
