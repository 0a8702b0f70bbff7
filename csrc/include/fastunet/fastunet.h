/* fastunet in C: class probabilities of images of any size by a trained U-Net, on the CPU. What predictor.hpp says of
 * the same things in C++ holds here.
 *
 *   fastunet_predictor* predictor;
 *   if (fastunet_load("model.safetensors", NULL, &predictor) != FASTUNET_OK) puts(fastunet_error());
 *   fastunet_image image = {pixels, FASTUNET_UINT8, height, width, 1, width, 1, 1};
 *   fastunet_result classes = {bytes, width, 1, 0};
 *   if (fastunet_predict_classes(predictor, &image, &classes, NULL, NULL) != FASTUNET_OK) puts(fastunet_error());
 *   fastunet_free(predictor);
 */
#ifndef FASTUNET_H
#define FASTUNET_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FASTUNET_C_API __attribute__((visibility("default")))
#else
#define FASTUNET_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  FASTUNET_OK = 0,
  FASTUNET_INVALID_ARGUMENT = 1,
  FASTUNET_BAD_FILE = 2, /* missing, damaged, or no model */
  FASTUNET_OUT_OF_MEMORY = 3,
  FASTUNET_CANCELLED = 4,
  FASTUNET_FAILED = 5 /* anything else: a defect of fastunet or of the system */
} fastunet_status;

/* One sentence on what went wrong in this thread's last call that did not return FASTUNET_OK; valid until its next. */
FASTUNET_C_API const char* fastunet_error(void);

typedef struct fastunet_predictor fastunet_predictor;

typedef struct {
  size_t size; /* sizeof(fastunet_options): later versions may have more of them */
  int tile;
  int rotations;
  uint64_t memory;
} fastunet_options;

/* The defaults, which a null pointer stands for, too. */
FASTUNET_C_API fastunet_options fastunet_default_options(void);

/* *predictor becomes null where there is none. */
FASTUNET_C_API fastunet_status fastunet_load(const char* model_file, const fastunet_options* options,
                                             fastunet_predictor** predictor);
FASTUNET_C_API void fastunet_free(fastunet_predictor* predictor); /* a null pointer is let alone */

typedef struct {
  int in_channels, num_classes, base_channels, depth;
} fastunet_model;

FASTUNET_C_API fastunet_status fastunet_describe(const fastunet_predictor* predictor, fastunet_model* model);
/* UTF-8, valid as long as the predictor; null where the file names no classes or there is no such class. */
FASTUNET_C_API const char* fastunet_class_name(const fastunet_predictor* predictor, int index);

typedef struct {
  ptrdiff_t tile_height, tile_width, preferred_height, preferred_width, tiles;
  uint64_t memory;
} fastunet_plan;

FASTUNET_C_API fastunet_status fastunet_plan_image(const fastunet_predictor* predictor, ptrdiff_t height,
                                                   ptrdiff_t width, fastunet_plan* plan);

typedef enum { FASTUNET_UINT8 = 0, FASTUNET_UINT16 = 1, FASTUNET_FLOAT32 = 2 } fastunet_pixel_type;

/* `data` is the first channel of the upper left pixel; strides are bytes, of either sign. */
typedef struct {
  const void* data;
  int type; /* a fastunet_pixel_type */
  ptrdiff_t height, width, channels;
  ptrdiff_t row_stride, pixel_stride, channel_stride;
} fastunet_image;

/* Where a result as large as the image goes: probabilities are float, a channel for each class; classes are one byte.
 */
typedef struct {
  void* data;
  ptrdiff_t row_stride, pixel_stride, channel_stride;
} fastunet_result;

/* Is told after every tile which part is done, up to 1; where it returns 0, the prediction ends in FASTUNET_CANCELLED.
 */
typedef int (*fastunet_progress)(void* user_data, double part);

FASTUNET_C_API fastunet_status fastunet_predict_probabilities(const fastunet_predictor* predictor,
                                                              const fastunet_image* image,
                                                              const fastunet_result* probabilities,
                                                              fastunet_progress progress, void* user_data);
FASTUNET_C_API fastunet_status fastunet_predict_classes(const fastunet_predictor* predictor,
                                                        const fastunet_image* image, const fastunet_result* classes,
                                                        fastunet_progress progress, void* user_data);

FASTUNET_C_API fastunet_status fastunet_set_threads(int count);
FASTUNET_C_API int fastunet_threads(void);

#ifdef __cplusplus
}
#endif

#endif
