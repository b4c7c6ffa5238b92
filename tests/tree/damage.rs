//! Bad bytes are an error with a place, never a panic, an endless walk or half an operation.
