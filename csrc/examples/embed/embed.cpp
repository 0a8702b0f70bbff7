// embed MODEL.safetensors IMAGE.pgm OUT.raw: predicts a grey image (binary PGM, 8 or 16 bit) and writes its class
// probabilities, float32, (height, width, classes).
#include <fastunet/predictor.hpp>

#include <cstdio>
#include <fstream>
#include <iostream>

int main(int count, char** arguments) try {
  if (count != 4) throw std::invalid_argument("usage: embed MODEL.safetensors IMAGE.pgm OUT.raw");
  const fastunet::Predictor predictor(arguments[1]);

  std::ifstream file(arguments[2], std::ios::binary);
  std::string magic;
  std::ptrdiff_t width = 0, height = 0;
  int most = 0;
  file >> magic >> width >> height >> most;
  file.get();
  if (!file || magic != "P5" || width < 1 || height < 1 || width > 65535 || height > 65535 || most < 1 || most > 65535)
    throw std::runtime_error(std::string(arguments[2]) + ": a binary PGM without comments is expected");
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(width) * height * (most > 255 ? 2 : 1));
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error(std::string(arguments[2]) + ": it ends before its last pixel");
  std::vector<std::uint16_t> words;  // of a PGM, the high byte comes first
  for (std::size_t i = 0; most > 255 && i < bytes.size(); i += 2) words.push_back(bytes[i] << 8 | bytes[i + 1]);
  const fastunet::Image image =
      most > 255 ? fastunet::Image(words.data(), height, width) : fastunet::Image(bytes.data(), height, width);

  const int classes = predictor.model().num_classes;
  std::vector<float> probabilities(static_cast<std::size_t>(width) * height * classes);
  predictor.predict(image, fastunet::Probabilities(probabilities.data(), height, width, classes), [](double part) {
    std::fprintf(stderr, "\r%3.0f %%", 100 * part);
    return true;  // false would cancel
  });
  std::ofstream out(arguments[3], std::ios::binary);
  out.write(reinterpret_cast<const char*>(probabilities.data()),
            static_cast<std::streamsize>(probabilities.size() * sizeof(float)));
  if (!out.flush()) throw std::runtime_error(std::string(arguments[3]) + ": it cannot be written");
} catch (const std::exception& error) {
  std::cerr << "embed: error: " << error.what() << '\n';
  return 2;
}
