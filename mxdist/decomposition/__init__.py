"""`mxdist decompose`: where the error of quantising a checkpoint's weights comes from.

    source          what a checkpoint offers: its tensors and parts of their values
    huggingface     safetensors directories and files
    run_checkpoint  run directories: Megatron's distributed checkpoints, read by Hugging Face name
    selection       which tensors a recipe would quantise, their kind, layer and contraction axis; why others are left
    pieces          cuts tensors into parts of bounded size that are quantised one by one
    survey          stream the tensors through `quant.decompose.measure`
    report          sums per tensor, layer, kind and in total; JSON
    table           what the terminal shows
    plots           one HTML file
    progress        the bar, or lines
    command         the command itself

Depends on `quant`, those modules of `model` that read files, and what `observe` knows of
run directories: no Ray, Megatron, vLLM, transformers. This file imports nothing.
"""
