"""What differs between models: sharded and quantized parameters, their configuration, the dtype they compute in."""
