/* The selective scan of scan.py on a CPU, in float32: one pass over the tokens, with the states in registers.

   Tensors are tokens first and contiguous: u, delta, y and their gradients (tokens, windows, channels), B and C (tokens,
   windows, STATES), A (channels, STATES). A window's channels are taken eight at a time; a call does the windows from
   `first` up to `last`, so that threads can share them. Compiled and called by scan_kernel.py. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 8, STATES = 16 };

/* Vectors of the compiler, of any processor: where it has none of eight floats, it takes smaller ones. */
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef Vector Tile[STATES]; /* the states of eight channels */

/* Where one tile of one window begins in every tensor, and how far the next token is. */
typedef struct {
    int64_t tokens, row, states_row;
    int lanes; /* channels of the tile that exist */
    const float *u, *delta, *B, *C;
    float *y;
} Strip;

/* 2^x for x <= 0 to 2e-7 of itself, 0 below 2^-126, NaN for NaN. */
static inline Vector exp2_of(Vector x)
{
    const Vector rounder = {0x1.8p23f, 0x1.8p23f, 0x1.8p23f, 0x1.8p23f, 0x1.8p23f, 0x1.8p23f, 0x1.8p23f, 0x1.8p23f};
    Vector shifted = x + rounder; /* its last bits are the nearest whole number */
    Vector f = x - (shifted - rounder);
    /* Taylor's series of 2^f for |f| <= 1/2: ln(2)^k / k!. */
    Vector p = 1.5403530e-4f * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    Bits power = ((Bits)shifted << 23) + (Bits)p;
    return (Vector)((power & (x > -126.0f)) | ((Bits)x & (x != x)));
}

static inline Vector load(const float *from, int lanes)
{
    if (lanes == LANES)
        return *(const Vector *)from;
    Vector v = {0};
    for (int j = 0; j < lanes; j++)
        v[j] = from[j];
    return v;
}

static inline void store(float *to, Vector v, int lanes)
{
    if (lanes == LANES)
        *(Vector *)to = v;
    else
        for (int j = 0; j < lanes; j++)
            to[j] = v[j];
}

/* A of a tile over ln 2, so that exp(delta A) is 2^(delta A). */
static void decay_rates(Tile rates, const float *A, int lanes)
{
    for (int n = 0; n < STATES; n++)
        for (int j = 0; j < LANES; j++)
            rates[n][j] = j < lanes ? A[j * STATES + n] * 1.44269504f : 0.0f;
}

/* The states of a strip, token by token, into y. Where they are wanted, all decays and states are kept. */
static inline __attribute__((always_inline)) void run(Strip s, const Vector *rates, Tile *decays, Tile *states)
{
    Tile h;
    memset(h, 0, sizeof h);
    for (int64_t t = 0; t < s.tokens; t++) {
        Vector delta = load(s.delta + t * s.row, s.lanes), y = {0};
        Vector step = load(s.u + t * s.row, s.lanes) * delta;
        const float *B = s.B + t * s.states_row, *C = s.C + t * s.states_row;
        for (int n = 0; n < STATES; n++) {
            Vector decay = exp2_of(delta * rates[n]);
            h[n] = decay * h[n] + step * B[n];
            y += C[n] * h[n];
            if (states) {
                decays[t][n] = decay;
                states[t][n] = h[n];
            }
        }
        store(s.y + t * s.row, y, s.lanes);
    }
}

/* Last token first: the gradients of what a strip reads, added to dA, dB and dC (those summed over eight lanes later). */
static inline __attribute__((always_inline)) void run_back(
    Strip s, const float *dy, float *du, float *ddelta, const Vector *rates, Tile *decays, Tile *states, Vector *dA, Tile *dB, Tile *dC)
{
    Tile later, none; /* a_{t+1} g_{t+1}; the state before the first token */
    memset(later, 0, sizeof later);
    memset(none, 0, sizeof none);
    for (int64_t t = s.tokens - 1; t >= 0; t--) {
        Vector delta = load(s.delta + t * s.row, s.lanes), u = load(s.u + t * s.row, s.lanes);
        Vector wanted = load(dy + t * s.row, s.lanes), step = u * delta, dstep = {0}, dlog2 = {0};
        const float *B = s.B + t * s.states_row, *C = s.C + t * s.states_row;
        const Vector *before = t ? states[t - 1] : none;
        for (int n = 0; n < STATES; n++) {
            Vector g = C[n] * wanted + later[n];
            dC[t][n] += wanted * states[t][n];
            dB[t][n] += step * g;
            dstep += B[n] * g;
            later[n] = decays[t][n] * g;
            Vector ddecay = later[n] * before[n];
            dlog2 += ddecay * rates[n];
            dA[n] += ddecay * delta;
        }
        store(du + t * s.row, dstep * delta, s.lanes);
        store(ddelta + t * s.row, dlog2 * 0.69314718f + dstep * u, s.lanes);
    }
}

static Strip strip_of(int64_t tokens, int64_t windows, int64_t channels, int64_t window, int64_t channel, const float *u,
                      const float *delta, const float *B, const float *C, float *y)
{
    int64_t at = window * channels + channel, left = channels - channel;
    return (Strip){tokens, windows * channels, windows * STATES, left < LANES ? (int)left : LANES,
                   u + at, delta + at, B + window * STATES, C + window * STATES, y + at};
}

void scan_forward(int64_t tokens, int64_t windows, int64_t channels, int64_t first, int64_t last, const float *u,
                  const float *delta, const float *A, const float *B, const float *C, float *y)
{
    for (int64_t channel = 0; channel < channels; channel += LANES)
        for (int64_t window = first; window < last; window++) {
            Strip s = strip_of(tokens, windows, channels, window, channel, u, delta, B, C, y);
            Tile rates;
            decay_rates(rates, A + channel * STATES, s.lanes);
            if (s.lanes == LANES) {
                s.lanes = LANES; /* known to the compiler from here on */
                run(s, rates, NULL, NULL);
            } else
                run(s, rates, NULL, NULL);
        }
}

/* y again and all gradients; dA (windows, channels, STATES) is each window's own. Returns 1 when memory ran out. */
int scan_backward(int64_t tokens, int64_t windows, int64_t channels, int64_t first, int64_t last, const float *u,
                  const float *delta, const float *A, const float *B, const float *C, const float *dy, float *y,
                  float *du, float *ddelta, float *dA, float *dB, float *dC)
{
    Tile *decays = aligned_alloc(64, 4 * tokens * sizeof(Tile));
    if (!decays)
        return 1;
    Tile *states = decays + tokens, *wide_dB = states + tokens, *wide_dC = wide_dB + tokens;
    for (int64_t window = first; window < last; window++) {
        memset(wide_dB, 0, 2 * tokens * sizeof(Tile));
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            Strip s = strip_of(tokens, windows, channels, window, channel, u, delta, B, C, y);
            int64_t at = window * channels + channel;
            Tile rates, wide_dA;
            decay_rates(rates, A + channel * STATES, s.lanes);
            memset(wide_dA, 0, sizeof wide_dA);
            if (s.lanes == LANES) {
                s.lanes = LANES;
                run(s, rates, decays, states);
                run_back(s, dy + at, du + at, ddelta + at, rates, decays, states, wide_dA, wide_dB, wide_dC);
            } else {
                run(s, rates, decays, states);
                run_back(s, dy + at, du + at, ddelta + at, rates, decays, states, wide_dA, wide_dB, wide_dC);
            }
            for (int j = 0; j < s.lanes; j++)
                for (int n = 0; n < STATES; n++)
                    dA[(at + j) * STATES + n] = wide_dA[n][j];
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int n = 0; n < STATES; n++) {
                int64_t to = (t * windows + window) * STATES + n;
                dB[to] = dC[to] = 0.0f;
                for (int j = 0; j < LANES; j++) {
                    dB[to] += wide_dB[t][n][j];
                    dC[to] += wide_dC[t][n][j];
                }
            }
    }
    free(decays);
    return 0;
}
