// The C interface of the CPU kernels: plain pointers, strides and sizes. No torch, no Python.
//
// Every function returns NEARFIELD_OK or an error. After NEARFIELD_INVALID nothing was written, nor read but for numbers
// that must be right themselves (cu_seqlens, blocks); after NEARFIELD_NO_MEMORY results may be written in part. Sizes
// and strides count elements. The last dimension (channels) of every tensor is contiguous.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define NEARFIELD_API __declspec(dllexport)
#else
#define NEARFIELD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a structure, the meaning of a field or the list of functions changes; the loader refuses another one.
#define NEARFIELD_ABI 4

enum { NEARFIELD_F32 = 0, NEARFIELD_BF16 = 1, NEARFIELD_F16 = 2 };           // dtype
enum { NEARFIELD_SHIFT = 0, NEARFIELD_TRUNCATE = 1, NEARFIELD_PAD = 2 };     // border
enum { NEARFIELD_OK = 0, NEARFIELD_INVALID = 1, NEARFIELD_NO_MEMORY = 2 };   // result

// [batch, z, y, x, head, channel]; data is NULL where the tensor is absent. Axes of one token may have any stride.
typedef struct {
    void *data;
    int64_t stride[5];  // of batch, z, y, x, head
} nearfield_tensor;

typedef struct {
    int64_t size, kernel_size, stride, dilation;
    int64_t is_causal;
} nearfield_axis;

// Neighborhood attention on a grid of three axes (those of fewer lead with size 1, kernel_size 1).
// Semantics: nearfield/ops/neighborhood/geometry.py and reference.py.
typedef struct {
    int64_t dtype, border;
    int64_t batch, heads, kv_heads, head_dim, value_dim;
    nearfield_axis axis[3];
    // 1-D only, else 0: queries are the tokens of axis x from here to the end. Below 0 there are more queries than keys,
    // which have no place: allowed where each sees the whole axis (border shift, kernel_size = size, not causal, no bias).
    int64_t first_query;
    int64_t num_sinks;       // 1-D only
    int64_t num_additional;  // additional keys, seen by every query
    double scale;

    nearfield_tensor query;              // grid of the queries: x counts from first_query
    nearfield_tensor key, value;
    nearfield_tensor additional_key, additional_value;  // [batch, 1, 1, num_additional, kv_heads, channel]
    const float *bias;                   // [heads, 2 kz - 1, 2 ky - 1, 2 kx - 1] contiguous, or NULL
    const uint8_t *key_mask;             // [batch, z, y, x] contiguous, 0: seen by nobody; or NULL
    const float *sink_logits;            // [heads] or NULL

    nearfield_tensor out;                // forward: written; backward: read
    nearfield_tensor lse;                // float, stride as query without channels; forward: written; backward: read

    // backward only; gradients have the dtype of the inputs and are overwritten, all of them
    nearfield_tensor grad_out;
    nearfield_tensor grad_lse;           // float, or absent
    nearfield_tensor grad_query, grad_key, grad_value, grad_additional_key, grad_additional_value;
    float *grad_bias;                    // [heads, 2 kz - 1, ...] contiguous; summed over the batch; or NULL: not wanted
} nearfield_attention;

// `count` problems as one parallel job: one call for a batch of sequences, or grids, of different sizes.
// A gradient of a bias is wanted from all of them or none, each with its own table.
NEARFIELD_API int nearfield_attention_forward(const nearfield_attention *problems, int64_t count, int64_t threads);
NEARFIELD_API int nearfield_attention_backward(const nearfield_attention *problems, int64_t count, int64_t threads);

// A few queries against a cache of keys in any order: which of them each query sees is a table of bytes.
typedef struct {
    int64_t dtype;
    int64_t batch, num_queries, num_keys, heads, kv_heads, head_dim, value_dim;
    double scale;
    nearfield_tensor query, key, value, out;  // tokens on axis x
    nearfield_tensor lse;                     // float, or absent
    const uint8_t *visible;                   // [batch or 1, num_queries, num_keys], or NULL: all are seen
    int64_t visible_stride[2];                // of batch (0: one row for all) and query; keys are contiguous
    const float *addend;                      // added to the scores [batch, heads, num_queries, num_keys], or NULL
    int64_t addend_stride[3];                 // of batch, head, query (each may be 0); keys are contiguous
    int64_t is_causal;                        // queries are the last of the keys, and see none behind themselves
    // Lists of the blocks of keys that are seen, each [list_length]: below 0 is none, one named twice counts once. One
    // behind the last makes the call NEARFIELD_INVALID. Block c holds the keys from c * block_size on.
    int64_t block_size, list_length;          // block_size 0: no lists, all keys are seen
    const int64_t *blocks;                    // [batch, num_queries, kv_heads, list_length]
    int64_t block_stride[3];                  // of batch, query (0: one list for all), kv_head; entries are contiguous
} nearfield_decode;

NEARFIELD_API int nearfield_decode_forward(const nearfield_decode *problem, int64_t threads);

// The share of each block of keys in the attention of a few queries, the mean of the heads that share the keys. In the
// place of the keys there may be one row for each block, block_size 1: then the last counts `last_part` times.
typedef struct {
    int64_t dtype, key_dtype;
    int64_t batch, num_queries, num_keys, heads, kv_heads, head_dim;
    int64_t block_size;
    int64_t is_bound;       // rows are the greatest, then the least of each channel, 2 head_dim: products are upper bounds
    int64_t is_causal;      // queries are the last of the keys, and see none behind themselves
    double scale, last_part;
    nearfield_tensor query, key;  // tokens on axis x
    const uint8_t *key_mask;      // [batch, num_keys] contiguous, 0: seen by nobody; or NULL
    float *shares;                // [batch, num_queries, kv_heads, blocks] contiguous; 0 only where nothing is seen
} nearfield_shares;

NEARFIELD_API int nearfield_block_shares(const nearfield_shares *problem, int64_t threads);

// The num_blocks blocks of the largest scores for each query and head. Those of its last num_recent keys and the first
// sink_blocks come before others, all of them. A block whose score is not above 0 is never chosen.
typedef struct {
    int64_t batch, num_queries, num_keys, kv_heads;  // queries are the last of the keys
    int64_t block_size, num_blocks, sink_blocks, num_recent;
    int64_t list_length;  // of the results: ascending numbers of blocks, then -1
    const float *scores;  // [batch, num_queries, kv_heads, blocks] contiguous
    int64_t *chosen;      // [batch, num_queries, kv_heads, list_length] contiguous
} nearfield_choice;

NEARFIELD_API int nearfield_choose_blocks(const nearfield_choice *problem, int64_t threads);

// A selective scan. Semantics: nearfield/ops/scan/reference.py. Tensors have tokens on axis x; B and C groups of
// channels on the axis of heads, and states as channels. Tables and states are float and contiguous.
typedef struct {
    int64_t dtype;                                        // of all tensors with tokens
    int64_t batch, tokens, channels, groups, state;
    int64_t sequences;                                    // with cu_seqlens: packed one after the other in a batch of 1
    int64_t softplus, reverse;                            // step = softplus(dt + dt_bias); from the last token to the first
    const int64_t *cu_seqlens;                            // [sequences + 1], from 0 to tokens; NULL: each batch row is one
    nearfield_tensor x, dt, z, B, C;                      // z may be absent
    const float *A, *D, *dt_bias;                         // [channels, state], [channels]; D and dt_bias may be NULL
    const float *initial_state;                           // [sequences, channels, state], or NULL: zeros
    nearfield_tensor out;                                 // forward only: written
    float *final_state;                                   // forward only: written, or NULL
    // The states at the starts of chunks, in the kernels' own order: forward writes them if it is not NULL, backward
    // reads them: for each chunk_rows(state) tokens, and once more for each sequence, the states of whole blocks of 16
    // channels of each group.
    float *chunk_states;

    // backward only; gradients are overwritten, all of them
    nearfield_tensor grad_out;
    const float *grad_final_state;                        // or NULL
    nearfield_tensor grad_x, grad_dt, grad_z, grad_B, grad_C;
    float *grad_A, *grad_D, *grad_dt_bias, *grad_initial_state;  // NULL where the operand is
} nearfield_scan;

NEARFIELD_API int nearfield_scan_forward(const nearfield_scan *problem, int64_t threads);
NEARFIELD_API int nearfield_scan_backward(const nearfield_scan *problem, int64_t threads);

// Local linear attention on a line of tokens, by conjugate gradients. Semantics: nearfield/ops/lla/reference.py.
typedef struct {
    int64_t dtype, border;                       // NEARFIELD_SHIFT or NEARFIELD_TRUNCATE
    int64_t batch, num_queries, num_keys, heads, kv_heads, head_dim, value_dim;
    int64_t kernel_size, is_causal;              // queries are the last tokens; fewer than keys only if causal
    int64_t max_iterations;
    double tolerance, scale;                     // a query's solver stops at this residual / right-hand side

    nearfield_tensor query, key, value;          // tokens on axis x
    nearfield_tensor ridge;                      // float, strides as query without channels
    const uint8_t *key_mask;                     // [batch, num_keys] contiguous, 0: seen by nobody; or NULL

    nearfield_tensor out;                        // forward: written
    nearfield_tensor correction;                 // float, strides as query; forward: written; backward: read

    // backward only; overwritten, all of them
    nearfield_tensor grad_out;                   // read
    nearfield_tensor grad_query, grad_key, grad_value;
    nearfield_tensor grad_ridge;                 // float
} nearfield_lla;

NEARFIELD_API int nearfield_lla_forward(const nearfield_lla *problem, int64_t threads);
NEARFIELD_API int nearfield_lla_backward(const nearfield_lla *problem, int64_t threads);

// Linear attention: out_t = scale q_t S_t with S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, or, where there is a beta,
// S_t = S' + beta_t k_t (v_t - S'^T k_t)^T with S' = diag(exp(g_t)) S_{t-1}: the delta rule.
typedef struct {
    int64_t dtype, g_dtype;
    int64_t gates;  // numbers that g has for a head and a position: 0 (no decay), 1 or head_dim
    int64_t batch, length, heads, head_dim, value_dim;
    double scale;
    nearfield_tensor query, key, value, out;  // tokens on axis x
    nearfield_tensor g;                       // logarithms of decays, at most 0
    nearfield_tensor beta;                    // float, without channels; or absent
    const float *initial_state;               // as all states [batch, heads, head_dim, value_dim] contiguous; or NULL
    float *final_state;

    // backward only, which reads neither out nor final_state
    nearfield_tensor grad_out;
    const float *grad_final_state;            // or NULL
    nearfield_tensor grad_query, grad_key, grad_value;
    nearfield_tensor grad_g;                  // dtype of g; absent: not wanted
    nearfield_tensor grad_beta;               // float
    float *grad_initial_state;                // or NULL: not wanted
} nearfield_linear;

NEARFIELD_API int nearfield_linear_forward(const nearfield_linear *problem, int64_t threads);
NEARFIELD_API int nearfield_linear_backward(const nearfield_linear *problem, int64_t threads);

// Instruction sets, best first, as a list "avx512bf16 avx512 avx2 baseline" of those that this machine executes.
NEARFIELD_API const char *nearfield_isas(void);
// The one in use, or NULL before the first choice; `nearfield_use` returns NEARFIELD_INVALID for another name.
NEARFIELD_API const char *nearfield_isa(void);
NEARFIELD_API int nearfield_use(const char *isa);
NEARFIELD_API int64_t nearfield_abi(void);
// Threads to run on from now on: GOMP_parallel of the OpenMP runtime that has them, or NULL for threads of our own.
NEARFIELD_API void nearfield_set_team(void *team);
// Work that a further thread must bring: 1 is about a millisecond, 0 is for tests, below 0 what suits the threads.
NEARFIELD_API void nearfield_set_grain(double milliseconds);

#ifdef __cplusplus
}
#endif
