"""How a model is spread over ranks and takes a step: DDP, FSDP2, DeepSpeed."""
