"""Ways to fill `.grad`: backpropagation, forward gradients and others, behind one interface, and what each is worth.

Cost in forward passes (F), variance E|g_hat|^2 / |g|^2 for d numbers, and memory:

    backprop              3 F     1          activations of all layers
    backprop-checkpoint   4 F     1          of one block
    forward               2 K F   d / K      flat in depth; K scalars are the whole gradient
    forward-dense         3 K F   d / K      the same with dense tangents
    forward-activity      4 K F   measured   flat; examples and activations perturbed instead of weights
    forward-local         7 F     biased     of one block; never uphill
    local-backprop        4 F     biased     of one block
    forward-exact         3 d F   1          an oracle for d <= 2,048
    zeroth-order          2 K F   d / K      flat; any operation
    hybrid                by rule

Full-model forward gradients lose to backprop on time for d > 2. `curate.estimators.probe` says by how much on a batch.
"""
