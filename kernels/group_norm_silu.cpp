// group_norm_silu.py's formulas for a CPU, channels-last, float32 and bfloat16; group_norm_silu_cpu.py compiles it.
//
// A thread takes one sample at a time, [pixels, channels] in memory, so what the first pass reads is still in its cache
// when the second comes. Loops over channels are innermost and become vector instructions. Sums run in a fixed order:
// the same bits for every number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

enum class BFloat16 : uint16_t {};  // its bits

template <typename To, typename From>
inline To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float load(float value) { return value; }
inline float load(BFloat16 value) { return bit_cast<float>(uint32_t(value) << 16); }

inline void store(float &to, float value) { to = value; }
inline void store(BFloat16 &to, float value) { to = BFloat16((bit_cast<uint32_t>(value) + 0x8000) >> 16); }

// 1 / (1 + 2^t), t = -z log2(e): 2^t is a polynomial of t's fraction, its exponent raised by t's nearest integer, which
// adding 1.5 * 2^23 leaves in the low bits.
inline float sigmoid(float z) {
  float t = z * -1.44269504f;
  t = t < -126.f ? -126.f : t;
  t = t > 126.f ? 126.f : t;
  const float shifted = t + 12582912.f, f = t - (shifted - 12582912.f);
  float p = f * (0.240226462f + f * (0.0555041f + f * (0.00961812f + f * 0.00133336f)));
  p = 1 + f * (0.693147182f + p);
  return 1 / (1 + bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23)));
}

struct Shape {
  int64_t batch, pixels, channels, groups;
};

// float32 rows: weight and bias of all samples [C]; scale and shift [B, C], or null.
struct Affine {
  const float *weight, *bias, *scale, *shift;

  // z = xhat * gain + offset
  void of(int64_t sample, int64_t C, float *gain, float *offset) const {
    for (int64_t c = 0; c < C; c++) {
      const float factor = scale ? 1 + scale[sample * C + c] : 1;
      gain[c] = weight[c] * factor;
      offset[c] = bias[c] * factor + (shift ? shift[sample * C + c] : 0);
    }
  }
};

struct alignas(64) CacheLine {
  float values[16];
};

#define EACH_CHANNEL _Pragma("GCC ivdep") for (int64_t c = 0; c < C; c++)

// body(rows, first element, channel) for all pixels, four at a time: what belongs to a channel is loaded once for them.
template <typename Body>
inline void each_pixel(int64_t N, int64_t C, Body body) {
  int64_t p = 0;
  for (; p + 4 <= N; p += 4) EACH_CHANNEL body(std::integral_constant<int, 4>(), p * C + c, c);
  for (; p < N; p++) EACH_CHANNEL body(std::integral_constant<int, 1>(), p * C + c, c);
}

// mean and rstd [C] of one sample. Deviations are from the mean of the first sixteenth of the pixels, which is at most
// four standard deviations off, so a large mean does not cancel.
template <typename T>
void statistics(const T *x, int64_t N, int64_t C, int64_t width, float eps, float *sum, float *square, float *mean,
                float *rstd) {
  const int64_t first = (N + 15) / 16;
  EACH_CHANNEL sum[c] = square[c] = 0;
  for (int64_t p = 0; p < first; p++) EACH_CHANNEL sum[c] += load(x[p * C + c]);
  EACH_CHANNEL mean[c] = sum[c] / first, sum[c] = 0;
  each_pixel(N, C, [=](auto rows, int64_t at, int64_t c) {
    float total = sum[c], squares = square[c];
    for (int i = 0; i < rows; i++) {
      const float d = load(x[at + i * C]) - mean[c];
      total += d;
      squares += d * d;
    }
    sum[c] = total, square[c] = squares;
  });
  for (int64_t g = 0; g < C; g += width) {
    float total = 0, squares = 0;
    for (int64_t c = g; c < g + width; c++) total += mean[c] += sum[c] / N;
    total /= width;
    for (int64_t c = g; c < g + width; c++) {
      const float apart = mean[c] - total;
      squares += square[c] - sum[c] * sum[c] / N + N * apart * apart;
    }
    for (int64_t c = g; c < g + width; c++) mean[c] = total, rstd[c] = 1 / std::sqrt(squares / (N * width) + eps);
  }
}

template <bool SILU, typename T>
void forward(const T *all_x, T *all_y, float *means, float *rstds, Affine affine, Shape shape, float eps) {
  const int64_t N = shape.pixels, C = shape.channels;
#pragma omp parallel
  {
    std::vector<CacheLine> room(C / 4 + 1);
    float *sum = room[0].values, *square = sum + C, *gain = sum + 2 * C, *offset = sum + 3 * C;
#pragma omp for schedule(dynamic)
    for (int64_t sample = 0; sample < shape.batch; sample++) {
      const T *x = all_x + sample * N * C;
      T *y = all_y + sample * N * C;
      float *mean = means + sample * C, *rstd = rstds + sample * C;
      statistics(x, N, C, C / shape.groups, eps, sum, square, mean, rstd);
      affine.of(sample, C, gain, offset);
      EACH_CHANNEL gain[c] *= rstd[c];
      each_pixel(N, C, [=](auto rows, int64_t at, int64_t c) {
        for (int i = 0; i < rows; i++) {
          const float z = (load(x[at + i * C]) - mean[c]) * gain[c] + offset[c];
          store(y[at + i * C], SILU ? z * sigmoid(z) : z);
        }
      });
    }
  }
}

template <bool SILU, typename T>
void backward(const T *all_dy, const T *all_x, T *all_dx, float *all_p, float *all_q, const float *means,
              const float *rstds, Affine affine, Shape shape) {
  const int64_t N = shape.pixels, C = shape.channels, width = C / shape.groups;
#pragma omp parallel
  {
    thread_local std::vector<CacheLine> room;  // kept: new memory would cost as much as a pass
    room.resize((4 + N) * C / 16 + 1);
    float *gain = room[0].values, *offset = gain + C, *mean_p = gain + 2 * C, *mean_q = gain + 3 * C, *dz = gain + 4 * C;
#pragma omp for schedule(dynamic)
    for (int64_t sample = 0; sample < shape.batch; sample++) {
      const T *dy = all_dy + sample * N * C, *x = all_x + sample * N * C;
      T *dx = all_dx + sample * N * C;
      const float *mean = means + sample * C, *rstd = rstds + sample * C;
      float *sum_p = all_p + sample * C, *sum_q = all_q + sample * C;
      affine.of(sample, C, gain, offset);
      EACH_CHANNEL sum_p[c] = sum_q[c] = 0;
      each_pixel(N, C, [=](auto rows, int64_t at, int64_t c) {
        float p = sum_p[c], q = sum_q[c];
        for (int i = 0; i < rows; i++) {
          const float xhat = (load(x[at + i * C]) - mean[c]) * rstd[c];
          float d = load(dy[at + i * C]);
          if (SILU) {
            const float z = xhat * gain[c] + offset[c], s = sigmoid(z);
            d *= s * (1 + z * (1 - s));
          }
          dz[at + i * C] = d;
          p += d * xhat;
          q += d;
        }
        sum_p[c] = p, sum_q[c] = q;
      });
      for (int64_t g = 0; g < C; g += width) {
        float p = 0, q = 0;
        for (int64_t c = g; c < g + width; c++) p += gain[c] * sum_p[c], q += gain[c] * sum_q[c];
        for (int64_t c = g; c < g + width; c++) {
          mean_p[c] = rstd[c] * rstd[c] * p / (N * width);
          mean_q[c] = rstd[c] * q / (N * width);
        }
      }
      EACH_CHANNEL gain[c] *= rstd[c];
      each_pixel(N, C, [=](auto rows, int64_t at, int64_t c) {
        for (int i = 0; i < rows; i++) {
          const float apart = load(x[at + i * C]) - mean[c];
          store(dx[at + i * C], gain[c] * dz[at + i * C] - mean_q[c] - apart * mean_p[c]);
        }
      });
    }
  }
}

}  // namespace

extern "C" {
#define FOR_TYPE(NAME, T)                                                                                            \
  void forward_##NAME(const T *x, T *y, float *mean, float *rstd, const Affine *affine, const Shape *shape, int silu, \
                      float eps) {                                                                                   \
    const auto function = silu ? forward<true, T> : forward<false, T>;                                               \
    function(x, y, mean, rstd, *affine, *shape, eps);                                                                \
  }                                                                                                                  \
  void backward_##NAME(const T *dy, const T *x, T *dx, float *p, float *q, const float *mean, const float *rstd,      \
                       const Affine *affine, const Shape *shape, int silu) {                                         \
    const auto function = silu ? backward<true, T> : backward<false, T>;                                             \
    function(dy, x, dx, p, q, mean, rstd, *affine, *shape);                                                          \
  }
FOR_TYPE(float32, float)
FOR_TYPE(bfloat16, BFloat16)
}
