"""The main problem at its smallest, as options."""

SMALL = [
    "problem=dino_masks", "backbone.tail_blocks=1", "backbone.embed_dim=24", "backbone.depth=2",
    "backbone.num_heads=2",
    "recipe.global_size=16", "recipe.local_size=8", "recipe.num_local=2",
    "data.rooms={num_frames: 40, size: [32, 48], seed: 0, folder: null}",
    "data.num_train=16", "data.num_meta=8", "problem.feature_size=[16, 24]",
    "problem.num_prototypes=32", "problem.head_hidden=16", "problem.head_bottleneck=8",
    "problem.batch_size=4",
    "problem.meta_batch_size=4", "problem.feedback_batch_size=4", "problem.head_steps=1",
    "problem.first_head_steps=2",
]  # fmt: skip
ENCODER = ["designer.encoder.width=8", "designer.encoder.depth=2", "designer.encoder.size=8"]
UNET = ["designer=unet", "designer.network.base=4", "designer.network.depth=1"]
