"""The kernels in other people's libraries; each module imports its library when it is used."""
