// almostgpt._bpe: the trainer for Python. Text comes as bytes, files are read here; the GIL is released
// while threads count and while merges are sought, and Ctrl-C ends both.

#include <fcntl.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "chunk_map.h"
#include "count.h"
#include "merge.h"

namespace py = pybind11;

namespace almostgpt::bpe {
namespace {

using Progress = std::function<void(size_t)>;

// Calls Python at most ten times a second, and raises what it raises, KeyboardInterrupt above all.
class Report {
 public:
  explicit Report(const Progress& progress) : progress_(progress) {}

  void operator()(size_t done) {
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress_) progress_(done);
  }

 private:
  using Clock = std::chrono::steady_clock;
  const Progress& progress_;
  Clock::time_point last_ = Clock::now();
};

Pattern pattern_of(const std::string& name) {
  if (name == "gpt2") return Pattern::gpt2;
  if (name == "gpt4") return Pattern::gpt4;
  throw std::invalid_argument("the patterns known here are gpt2 and gpt4, not " + name);
}

template <Pattern pattern>
py::list split_all(const std::vector<uint8_t>& text, size_t size) {
  py::list chunks;
  for (const uint8_t *at = text.data(), *end = at + size; at < end;) {
    const uint8_t* next = chunk_end<pattern>(at, end);
    chunks.append(py::bytes(reinterpret_cast<const char*>(at), next - at));
    at = next;
  }
  return chunks;
}

py::list split_text(std::string_view text, const std::string& pattern) {
  std::vector<uint8_t> held(text.begin(), text.end());
  held.resize(held.size() + chunk_padding);
  return pattern_of(pattern) == Pattern::gpt2 ? split_all<Pattern::gpt2>(held, text.size())
                                              : split_all<Pattern::gpt4>(held, text.size());
}

class Trainer {
 public:
  Trainer(const std::string& pattern, int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be 1 or more");
    counter_.emplace(pattern_of(pattern), threads);
  }

  void add(std::string_view document) {
    const py::gil_scoped_release no_gil;
    counter_->add(document);
    counter_->end_document();
  }

  // One document, read a block at a time. Raises OSError with the name of the file.
  size_t add_file(const py::object& path, const Progress& progress) {
    const auto name = py::module_::import("os").attr("fsencode")(path).cast<std::string>();
    const File file{open(name.c_str(), O_RDONLY | O_CLOEXEC)};
    if (file.number < 0) throw_os_error(path);
    std::vector<char> block(1 << 18);
    Report report(progress);
    size_t size = 0;
    while (const ssize_t got = read_some(file, block)) {
      if (got < 0) throw_os_error(path);
      const py::gil_scoped_release no_gil;
      counter_->add({block.data(), static_cast<size_t>(got)});
      report(size += got);
    }
    const py::gil_scoped_release no_gil;
    counter_->end_document();
    return size;
  }

  // Chunks that were split elsewhere, and how often each occurs.
  void add_chunks(const py::dict& counts) {
    std::vector<uint8_t> padded;
    for (const auto& [key, value] : counts) {
      const auto chunk = key.cast<std::string_view>();
      const auto times = value.cast<uint64_t>();
      if (chunk.empty() || times == 0) continue;
      padded.assign(chunk.begin(), chunk.end());
      padded.resize(chunk.size() + chunk_padding);
      split_elsewhere_.add(padded.data(), chunk.size(), times);
    }
  }

  // The merges, (left, right) each, and how many distinct chunks there were. It empties the trainer.
  std::pair<std::vector<std::pair<uint32_t, uint32_t>>, size_t> train(size_t merges,
                                                                     const Progress& progress) {
    const py::gil_scoped_release no_gil;
    ChunkMap chunks = counter_->finish();
    chunks.add(std::exchange(split_elsewhere_, ChunkMap()));
    const size_t distinct = chunks.size();
    Report report(progress);
    std::vector<std::pair<uint32_t, uint32_t>> found;
    for (const auto [left, right] :
         find_merges(std::move(chunks), merges, [&](size_t done) { report(done); })) {
      found.emplace_back(left, right);
    }
    return {std::move(found), distinct};
  }

 private:
  struct File {
    int number;
    ~File() {
      if (number >= 0) close(number);
    }
  };

  // As read() has it, and a signal is seen to: the file may be a pipe that waits for its writer.
  static ssize_t read_some(const File& file, std::vector<char>& block) {
    while (true) {
      ssize_t got;
      {
        const py::gil_scoped_release no_gil;
        got = read(file.number, block.data(), block.size());
      }
      if (got >= 0 || errno != EINTR) return got;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }

  [[noreturn]] static void throw_os_error(const py::object& path) {
    PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path.ptr());
    throw py::error_already_set();
  }

  std::optional<ChunkCounter> counter_;
  ChunkMap split_elsewhere_;
};

}  // namespace

PYBIND11_MODULE(_bpe, module) {
  module.doc() = "Trains byte-pair encoding; almostgpt.data.bpe is what to call.";
  module.def("split", &split_text, py::arg("text"), py::arg("pattern"),
             "The chunks of a text in UTF-8 (bytes): those of the pattern gpt2 or gpt4.");
  py::class_<Trainer>(module, "Trainer", "Counts documents, then finds merges.")
      .def(py::init<const std::string&, int>(), py::arg("pattern"), py::arg("threads"))
      .def("add", &Trainer::add, py::arg("document"), "Counts a document (bytes, UTF-8).")
      .def("add_file", &Trainer::add_file, py::arg("path"), py::arg("progress") = Progress(),
           "Counts a file as one document, calling progress(bytes read) at times; its size in bytes.")
      .def("add_chunks", &Trainer::add_chunks, py::arg("counts"),
           "Counts chunks (bytes) that were split elsewhere: a dict of how often each occurs.")
      .def("train", &Trainer::train, py::arg("merges"), py::arg("progress") = Progress(),
           "Finds merges, calling progress(merges found) at times: (the merges, the number of "
           "distinct chunks). The trainer is then empty.");
}

}  // namespace almostgpt::bpe
