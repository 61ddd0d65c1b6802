"""Machinery shared by the linear kernels: expansions, arguments, and the four forms of the same sum.

Every form computes, for one kernel with kernel(q.k) = phi(q).phi(k),

    num_i = sum_{j <= i} kernel(scale q_i.k_j) exp(G_i - G_j + bias_ij) v_j  (+ exp(G_i) phi(scale q_i).S_0)
    den_i = the same sum with 1 in place of v_j                              (+ exp(G_i) phi(scale q_i).z_0)

with G the cumulative sum of the log gates, over the keys of the query's own document; the output is num / den.
"""
