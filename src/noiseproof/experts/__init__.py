"""Linear layers with one shared down-projection and several up-projections, mixed token by token.

    h = A x (.., r);  w = softmax(Wg x) (.., N);  y = W0 x + b0 + s sum_i w_i B_i h,  s = alpha / r

The layout of HydraLoRA (Tian et al., NeurIPS 2024, arXiv:2404.19245); with poisoning experts behind
the normal ones it is the layer of LoPE (Wang et al., NeurIPS 2025, arXiv:2505.23868). Experts are
numbered normal first. At inference the poisoning experts can be left out in several ways, see
`expert_weights`, without training again.
"""
