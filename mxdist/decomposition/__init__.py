"""`mxdist decompose`: where the error of quantising a checkpoint's weights comes from.

    source          what a checkpoint offers: its tensors and parts of their values
    huggingface     safetensors directories and files
    run_checkpoint  run directories: Megatron's distributed checkpoints, read by Hugging Face name
    selection       which tensors a recipe would quantise, their kind, layer and contraction axis; why others are left
    survey          stream the tensors through `quant.decompose.measure`
    report          sums per tensor, layer, kind and in total; JSON
    table           what the terminal shows
    plots           one HTML file
    progress        the bar, or lines
    command         the command itself

Depends on `quant`, the files of `model` and `config`: no Ray, Megatron, vLLM, transformers. This file imports nothing.
"""
