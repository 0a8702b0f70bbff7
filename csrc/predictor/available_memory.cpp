#include "available_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

#include <sys/resource.h>
#include <unistd.h>

namespace fastunet {
namespace {

constexpr double kUnlimited = std::numeric_limits<double>::infinity();

// The number after `name` in a file of lines of a name and a number, or -1.
double number_after(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string first;
    double number;
    if (words >> first >> number && first == name) return number;
  }
  return -1;
}

// The number that a file is, or -1.
double number_in(const std::string& path) {
  std::ifstream file(path);
  double number;
  return file >> number ? number : -1;
}

// A container's limit (cgroup v2 and v1, its own and every enclosing group's) less what it uses, where file cache that
// the system would drop does not count as used.
double container_memory() {
  double free = kUnlimited;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool v2 = controllers == ",,";
    if (!v2 && controllers.find(",memory,") == std::string::npos) continue;
    const std::string base = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    // Inside a container the group's own path may not be mounted; its limits then lie at the mount itself.
    for (std::string group = line.substr(second + 1);; group.erase(group.rfind('/'))) {
      const std::string folder = base + group + "/";
      const double limit = number_in(folder + (v2 ? "memory.max" : "memory.limit_in_bytes"));
      const double used = number_in(folder + (v2 ? "memory.current" : "memory.usage_in_bytes"));
      const double cache = number_after(folder + "memory.stat", v2 ? "inactive_file" : "total_inactive_file");
      if (limit >= 0 && used >= 0) free = std::min(free, limit - used + std::max(cache, 0.0));
      if (group.find('/') == std::string::npos) break;
    }
  }
  return free;
}

double address_space() {
  rlimit limit;
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnlimited;
  const double pages = number_in("/proc/self/statm");
  return static_cast<double>(limit.rlim_cur) - std::max(pages, 0.0) * static_cast<double>(sysconf(_SC_PAGESIZE));
}

}  // namespace

double available_memory() {
  const double machine = number_after("/proc/meminfo", "MemAvailable:");
  if (machine < 0) return static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 2;
  return std::max(0.0, std::min({machine * 1024, container_memory(), address_space()}));
}

}  // namespace fastunet
