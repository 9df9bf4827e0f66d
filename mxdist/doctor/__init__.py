"""``mxdist doctor``: would this configuration start here, and if not, what to change.

    model_size    how many numbers each learner rank and an engine hold, by kind. Arithmetic on the configuration.
    activations   what the learner keeps of a forward pass for the backward pass
    memory        the two together: bytes of a learner rank, of an engine, of the host
    fit           the same held against a GPU, and the one setting that helps most
    versions, devices, machine, inputs, collective
                  the checks: functions that look at one thing each and return a finding
    findings      what a check says
    report        the table, the lines and the JSON
    command       what the command does with them

Neither torch nor Ray is imported for the estimate.
"""
